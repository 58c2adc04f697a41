"""Answers of a trained model to single clips and questions."""
