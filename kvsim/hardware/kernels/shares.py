"""Constants of kernel prices as files may state them: times, counts, and shares of a datasheet's figure."""

from typing import Annotated

from pydantic import Field

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]  # no kernel is faster than the datasheet
Stretch = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # of what is partly hidden, and so may exceed 1
Sharpness = Annotated[float, Field(ge=0.5, le=16)]  # of a smooth maximum
