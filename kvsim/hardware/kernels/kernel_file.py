"""The `kernels` of a GPU's file: constants of every kernel, or the name of the GPU that they are taken from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

from kvsim.hardware.kernels.attention import DecodeFit, PrefillFit
from kvsim.hardware.kernels.chip import GEMM_DTYPES, KV_DTYPES
from kvsim.hardware.kernels.clusters import ClusterFit
from kvsim.hardware.kernels.collectives import AllReduceFit
from kvsim.hardware.kernels.experts import MoeFit
from kvsim.hardware.kernels.gemm import GemmFit, HostLaunch, Tile
from kvsim.hardware.kernels.shares import Seconds, Share
from kvsim.hardware.kernels.transfers import TransferFit
from policies.shown import shown

T = TypeVar("T")


def _pairs(value: object) -> object:
    return tuple(value.items()) if isinstance(value, dict) else value


ByType = Annotated[tuple[tuple[str, T], ...], BeforeValidator(_pairs), Field(min_length=1)]
"""Constants by the type of weights, or of cached keys and values; a mapping in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseFit:
    """Constants of norms, activations and additions that no GEMM takes along."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    hbm: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFits:
    """Constants of all kernels of one GPU; `all_reduce` only where NVLink joins it to others."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    gemm: ByType[GemmFit]
    prefill_attention: ByType[PrefillFit]
    decode_attention: ByType[DecodeFit]
    moe: ByType[MoeFit]
    elementwise: ElementwiseFit
    transfers: TransferFit
    clusters: ClusterFit
    all_reduce: AllReduceFit | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("gemm", GEMM_DTYPES),
            ("moe", GEMM_DTYPES),
            ("prefill_attention", KV_DTYPES),
            ("decode_attention", KV_DTYPES),
        ):
            given = dict(getattr(self, name))
            if "bf16" not in given:
                raise ValueError(f"{name} must give constants for bf16, which stand in for all types without their own")
            for dtype in given:
                if dtype not in known:
                    raise ValueError(f"{name} has an unknown dtype {shown(dtype)}; known: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """The catalogue's GPU whose constants are taken, and how fast this one multiplies in comparison."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    like: str
    products: Annotated[float, Field(gt=0, le=1)] = 1.0  # shares of the peak, relative to the other GPU's


CONSTANTS = sorted(
    {
        field.name
        for kind in (KernelFits, Likeness, GemmFit, Tile, HostLaunch, PrefillFit, DecodeFit, AllReduceFit, MoeFit,
                     ElementwiseFit, TransferFit, ClusterFit)
        for field in fields(kind)
    }
)  # fmt: skip
"""Every name that `kernels` of a file may have."""


def slowed(fits: KernelFits, products: float) -> KernelFits:
    """The same constants where products reach `products` of their shares of the peak."""

    def gemm(fit: GemmFit) -> GemmFit:
        tiles = tuple(replace(tile, peak=tile.peak * products) for tile in fit.tiles)
        return replace(fit, tiles=tiles, peak=fit.peak * products)

    return replace(
        fits,
        gemm=tuple((dtype, gemm(fit)) for dtype, fit in fits.gemm),
        prefill_attention=tuple((d, replace(fit, peak=fit.peak * products)) for d, fit in fits.prefill_attention),
        moe=tuple((dtype, replace(fit, peak=fit.peak * products)) for dtype, fit in fits.moe),
    )


def fit_for(fits: tuple[tuple[str, T], ...], dtype: str, product: str) -> T:
    """The constants for weights of `dtype` that multiply in `product`: their own, or those of what is alike."""
    known: Mapping[str, T] = dict(fits)
    alike = "fp8" if product in ("fp8", "int8") else "bf16"
    for name in (dtype, product, alike, "bf16"):
        if name in known:
            return known[name]
    raise AssertionError(f"no constants for {shown(dtype)}")  # KernelFits asks for bf16
