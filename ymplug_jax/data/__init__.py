"""Input pipeline from stored clips and texts to batches: records, frames, transforms, tokenizers and the loader."""
