"""Preparation of data before training: videos and CSVs to shards. Only this package uses TensorFlow and Beam."""
