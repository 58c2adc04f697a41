"""Curation of drawn clips, which last 1.3 s: the default thresholds with a lower shortest duration."""

from ml_collections import ConfigDict

from data_prep.curation.settings import Curation, Metadata, to_config_dict


def get_config() -> ConfigDict:
    """Give it to data_prep.curate as --config."""
    return to_config_dict(Curation(metadata=Metadata(min_seconds=0.05)))
