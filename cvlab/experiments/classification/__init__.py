"""Image classification: models, data sets, training, prediction on photos."""
