"""Curation of raw uploads with the default thresholds: clips of 10 to 120 s, as in Youku-mPLUG."""

from ml_collections import ConfigDict

from data_prep.curation.settings import Curation, to_config_dict


def get_config() -> ConfigDict:
    """Give it to data_prep.curate as --config."""
    return to_config_dict(Curation())
