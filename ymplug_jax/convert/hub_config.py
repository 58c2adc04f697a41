"""Reads config.json of the Hugging Face layout, which holds sizes that the shapes of the tensors do not tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.convert.plan import UnknownModel
from ymplug_jax.convert.source_files import SourceError, read_json

FILE = "config.json"


class HubConfig(NamedTuple):
    """The settings beside the weights."""

    file: Path
    values: Mapping[str, Any]

    def size(self, *names: str) -> int:
        """The value of the first of these names that is set.

        Raises:
          UnknownModel: none is set, or the value is not a whole number above 0.
        """
        value = next((self.values[name] for name in names if self.values.get(name) is not None), None)
        if type(value) is not int or value < 1:
            raise UnknownModel(f"{self.file}: {names[0]} is {value!r}, not a whole number above 0; download it again")
        return value

    def number(self, name: str, default: float) -> float:
        """The value of a name, or `default`, which should be that of Hugging Face's class.

        Raises:
          UnknownModel: the value is not a number above 0.
        """
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UnknownModel(f"{self.file}: {name} is {value!r}, not a number above 0; download it again")
        return float(value)

    def agree(self, found: Mapping[str, int]) -> None:
        """Check the stated sizes against those of the tensors.

        Raises:
          UnknownModel: a stated size differs.
        """
        for name, size in found.items():
            stated = self.values.get(name)
            if stated is not None and stated != size:
                raise UnknownModel(
                    f"{self.file}: {name} is {stated!r}, but the weights have {size}; download both from the same place"
                )


def beside(files: Sequence[Path], types: Sequence[str]) -> HubConfig | None:
    """Read the config.json in the folder of the weights; None if there is none.

    Args:
      files: files of the source.
      types: accepted values of model_type.

    Raises:
      SourceError: the file is damaged.
      UnknownModel: the file describes another model or quantised weights.
    """
    file = files[0].parent / FILE
    if not file.is_file():
        return None
    values = read_json(file)
    if not isinstance(values, dict):
        raise SourceError(f"{file}: not the settings of a model; download it again")
    if values.get("model_type") not in types:
        raise UnknownModel(f"{file}: model_type is {values.get('model_type')!r}, not {' or '.join(types)}")
    if values.get("quantization_config"):
        raise UnknownModel(f"{file}: the weights are quantised (quantization_config); give unquantised weights")
    return HubConfig(file, values)
