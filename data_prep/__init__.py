"""Videos and CSVs to shards, once, before training: the only home of TensorFlow and Beam."""
