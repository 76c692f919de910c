"""What a GPU costs by the hour and what its board draws: a file that users replace."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from kvsim.text.documents import parse_yaml, read_document, validated
from kvsim.text.names import nearest_first
from policies.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """USD for one GPU and an hour, and the most watts that its board draws (None: not known), with their sources."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    usd_per_hour: Annotated[float, Field(gt=0)]
    price_source: Annotated[str, Field(min_length=1)]
    price_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")]
    watts: Annotated[float, Field(gt=0)] | None = None
    watts_source: str | None = None


_PRICES = TypeAdapter(dict[str, Price])
_KEYS = [*Price.__dataclass_fields__]


class Prices:
    """The prices of a file, by name of the GPU."""

    def __init__(self, file: Path | None = None) -> None:
        """Those of `file`, or of the package. Raises ValueError for a file that is not valid."""
        self.origin = "the catalogue's prices.yaml" if file is None else str(file)
        shipped = files("kvsim") / "catalogue" / "prices.yaml"
        document = shipped.read_text(encoding="utf-8") if file is None else read_document(file)
        self._by_gpu = validated(_PRICES, parse_yaml(document, self.origin), _KEYS, self.origin)

    def of(self, gpu: str) -> Price:
        """The price of a GPU; ValueError where the file has none, which says what to write."""
        if gpu not in self._by_gpu:
            known = ", ".join(nearest_first(gpu, self._by_gpu))
            raise ValueError(
                f"{self.origin} has no price for GPU {shown(gpu)}; write a file with `{gpu}: {{usd_per_hour: ..., "
                f"price_source: ..., price_date: 2026-01-31}}` and give it with --prices FILE; it has {known}"
            )
        return self._by_gpu[gpu]
