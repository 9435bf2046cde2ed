"""Image captioning: models, training, beam search, evaluation."""
