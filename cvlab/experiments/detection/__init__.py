"""Object detection: models, annotations, training, evaluation, prediction on photos."""
