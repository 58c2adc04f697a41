"""Train, evaluate and serve the Youku-mPLUG family of Chinese video-language models in JAX."""

__version__ = "0.1.0"
