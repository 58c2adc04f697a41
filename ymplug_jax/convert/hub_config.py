"""config.json of the Hugging Face layout: what the shapes of a model's tensors do not tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.convert.plan import UnknownModel
from ymplug_jax.convert.source_files import SourceError, read_json

FILE = "config.json"


class HubConfig(NamedTuple):
    """The settings that lie beside the weights."""

    file: Path
    values: Mapping[str, Any]

    def size(self, *names: str) -> int:
        """A whole number above 0 under the first of these names that is there.

        Raises:
          UnknownModel: there is none.
        """
        value = next((self.values[name] for name in names if self.values.get(name) is not None), None)
        if type(value) is not int or value < 1:
            raise UnknownModel(f"{self.file}: {names[0]} is {value!r}, not a number; fetch the file again")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0; `default` is what Hugging Face's class takes where the name is missing.

        Raises:
          UnknownModel: it is something else.
        """
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UnknownModel(f"{self.file}: {name} is {value!r}, not a number above 0; fetch the file again")
        return float(value)

    def agree(self, found: Mapping[str, int]) -> None:
        """Compare with the sizes that the tensors have.

        Raises:
          UnknownModel: one that is stated differs.
        """
        for name, size in found.items():
            stated = self.values.get(name)
            if stated is not None and stated != size:
                raise UnknownModel(
                    f"{self.file}: {name} is {stated!r}, but the weights have {size}; fetch both from one place"
                )


def beside(files: Sequence[Path], types: Sequence[str]) -> HubConfig | None:
    """The config.json in the folder of the weights; None: there is none.

    Args:
      files: of the source.
      types: the values of model_type that the model is known by.

    Raises:
      SourceError: it is damaged.
      UnknownModel: it is that of another model.
    """
    file = files[0].parent / FILE
    if not file.is_file():
        return None
    values = read_json(file)
    if not isinstance(values, dict):
        raise SourceError(f"{file}: damaged, no settings of a model; fetch it again")
    if values.get("model_type") not in types:
        raise UnknownModel(f"{file}: model_type is {values.get('model_type')!r}; this model is {' or '.join(types)}")
    if values.get("quantization_config"):
        raise UnknownModel(f"{file}: the weights are quantised (quantization_config); give those that are not")
    return HubConfig(file, values)
