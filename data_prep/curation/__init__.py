"""Curation: what is measured of a clip and its title, the reasons to drop it, and near-duplicates. `data_prep.curate` runs it."""
