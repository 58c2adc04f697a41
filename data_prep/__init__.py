"""Preparation of data before training: videos and CSVs to shards. Only this package uses TensorFlow and Beam."""

import ymplug_jax as ymplug_jax  # sets how etils, Orbax and TFDS reach buckets, before TFDS is imported
