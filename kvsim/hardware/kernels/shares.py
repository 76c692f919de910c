"""Constants of kernel prices as files may state them: times, counts, and shares of a datasheet's figure."""

from typing import Annotated

from pydantic import BeforeValidator, Field


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


_Number = BeforeValidator(_number)
Seconds = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, _Number, Field(gt=0)]
Share = Annotated[float, _Number, Field(gt=0, le=1)]  # no kernel is faster than the datasheet
Stretch = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]  # of what is partly hidden: may exceed 1
Sharpness = Annotated[float, _Number, Field(ge=0.5, le=16)]  # of a smooth maximum
