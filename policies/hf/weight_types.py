"""Formats of quantised weights by the names that toolkits have for them."""

from typing import Any

from policies.hf.keys import Keys
from policies.shown import shown
from policies.weight_formats import WeightFormat

_PER_MATRIX = {"rows": 0, "columns": 0, "scale_bits": 32}


def modelopt_format(keys: Keys, algorithm: Any, group: Any) -> WeightFormat | None:
    """The format of a `quant_algo` of NVIDIA ModelOpt; scales are fp32, but those of blocks in NVFP4 and MX formats."""
    group = group if type(group) is int and 0 < group <= 2**20 else 128
    known: dict[str, WeightFormat | None] = {
        # A scale of the matrix and one of its inputs.
        "FP8": WeightFormat(dtype="fp8", bits=8, **_PER_MATRIX, fixed_bytes=4, quantises_activations=True),
        "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat(dtype="fp8", bits=8, scale_bits=32, quantises_activations=True),
        "FP8_PB_WO": WeightFormat(dtype="fp8", bits=8, rows=128, columns=128, scale_bits=32),
        "FP8_PB_REAL": WeightFormat(
            dtype="fp8", bits=8, rows=128, columns=128, scale_bits=32, quantises_activations=True
        ),
        # An fp8 scale of 16 elements, an fp32 one of the matrix, one of its inputs.
        "NVFP4": WeightFormat(
            dtype="nvfp4", bits=4, columns=16, scale_bits=8, fixed_bytes=8, quantises_activations=True
        ),
        "NVFP4_AWQ": WeightFormat(
            dtype="nvfp4", bits=4, columns=16, scale_bits=8, input_bits=16, fixed_bytes=8, quantises_activations=True
        ),
        "W4A16_NVFP4": WeightFormat(dtype="nvfp4", bits=4, columns=16, scale_bits=8, fixed_bytes=4),
        "MXFP8": WeightFormat(dtype="mxfp8", bits=8, columns=32, scale_bits=8, quantises_activations=True),
        "W4A8_MXFP4_FP8": WeightFormat(dtype="mxfp4", bits=4, columns=32, scale_bits=8),
        "MXFP4": WeightFormat(dtype="mxfp4", bits=4, columns=32, scale_bits=8),
        "W4A16": WeightFormat(dtype="int4", bits=4, columns=group, scale_bits=32),
        "W4A16_AWQ": WeightFormat(dtype="int4", bits=4, columns=group, scale_bits=32, input_bits=16),
        "W4A8_AWQ": WeightFormat(dtype="int4", bits=4, columns=group, scale_bits=32, input_bits=16, fixed_bytes=8),
        "W8A16": WeightFormat(dtype="int8", bits=8, scale_bits=32),
        "W8A8_SQ_PER_CHANNEL": WeightFormat(
            dtype="int8", bits=8, scale_bits=32, input_bits=16, fixed_bytes=4, quantises_activations=True
        ),
        "NO_QUANT": None,
    }
    known |= {"FP8_DEFAULT": known["FP8"], "INT4_AWQ": known["W4A16_AWQ"], "INT8_SQ": known["W8A8_SQ_PER_CHANNEL"]}
    known |= {"NVFP4_W4A16": known["W4A16_NVFP4"], "W4A4_NVFP4": known["NVFP4"]}
    if algorithm is None:
        return None
    if not isinstance(algorithm, str) or algorithm.upper() not in known:
        raise keys.error("quantization_config", f"has no quant_algo that is known: {', '.join(known)}")
    return known[algorithm.upper()]


def compressed_tensors_format(keys: Keys, layout: str) -> WeightFormat | None:
    """The format of one group of compressed-tensors; None where it quantises activations alone."""
    if keys.value("weights") is None:
        return None
    weights = Keys(keys.mapping("weights"), "weights", {})
    inputs = Keys(keys.mapping("input_activations"), "input_activations", {})
    bits, kind = weights.number("num_bits"), weights.value("type")
    quantises = inputs.value("num_bits") == bits and inputs.value("type") == kind
    static = "num_bits" in inputs and inputs.value("dynamic") is False
    group = weights.number("group_size", 128, least=-1)
    strategy = weights.value("strategy") or ("group" if "group_size" in weights else "tensor")
    if (bits, kind) == (4, "float"):
        if group == 16:
            # An fp8 scale of 16 elements, an fp32 one of the matrix, and one of inputs where they are quantised.
            inputs_bytes = 4 if "num_bits" in inputs else 0
            return WeightFormat(
                dtype="nvfp4",
                bits=4,
                columns=16,
                scale_bits=8,
                fixed_bytes=4 + inputs_bytes,
                quantises_activations=quantises,
            )
        return WeightFormat(dtype="mxfp4", bits=4, columns=32, scale_bits=8)
    if (bits, kind) == (8, "float") and "mx" in layout:
        return WeightFormat(dtype="mxfp8", bits=8, columns=32, scale_bits=8, quantises_activations=quantises)
    blocks = {"tensor": (0, 0), "channel": (1, 0), "group": (1, max(0, group)), "tensor_group": (1, max(0, group))}
    if strategy == "block":
        shape = weights.sequence("block_structure")
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise weights.error("block_structure", "must be two whole numbers, such as [128, 128]")
        blocks["block"] = (shape[0], shape[1])
    if not isinstance(strategy, str) or strategy not in blocks:
        raise weights.error("strategy", f"is not one of {', '.join(blocks)}, block")
    rows, columns = blocks[strategy]
    dtypes = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4", (3, "int"): "int4", (2, "int"): "int4"}
    if kind not in ("int", "float") or (bits, kind) not in dtypes:
        raise weights.error("num_bits", f"and type {shown(kind)} must be 8 bits of float, or 2, 3, 4 or 8 of int")
    packed = layout == "pack-quantized"
    return WeightFormat(
        dtype=dtypes[bits, kind],
        bits=bits,
        rows=rows,
        columns=columns,
        zero_bits=bits if packed and not weights.flag("symmetric", True) else 0,
        input_bits=32 if weights.value("actorder") in ("group", True) else 0,
        # The shape before packing, two int64; the scale of static inputs, in 16 bits.
        fixed_bytes=(16 if packed else 0) + (2 if static else 0),
        quantises_activations=quantises,
    )


def quark_format(keys: Keys, layer: Any) -> WeightFormat | None:
    """The format of AMD Quark's settings of one layer; None where its weights are not quantised."""
    weights = Keys(Keys(layer if isinstance(layer, dict) else {}, "layer", {}).mapping("weight"), "weight", {})
    if "dtype" not in weights:
        return None
    dtype, scheme = weights.value("dtype"), weights.value("qscheme")
    group = weights.number("group_size", 32, least=-1)
    inputs = Keys(layer, "layer", {}).mapping("input_tensors")
    quantises = inputs.get("dtype") == dtype
    match dtype, scheme:
        case "fp4", "per_group":
            return WeightFormat(dtype="mxfp4", bits=4, columns=group, scale_bits=8, quantises_activations=quantises)
        case (("fp8_e4m3" | "int8"), ("per_tensor" | "per_channel")):
            rows = 0 if scheme == "per_tensor" else 1
            static = 4 if inputs and inputs.get("is_dynamic") is False else 0
            name = "fp8" if dtype == "fp8_e4m3" else "int8"
            return WeightFormat(
                dtype=name, bits=8, rows=rows, scale_bits=32, fixed_bytes=static, quantises_activations=quantises
            )
        case (("int4" | "uint4"), "per_group"):
            return WeightFormat(dtype="int4", bits=4, columns=max(0, group), zero_bits=4)
    what = f"{shown(dtype)} and qscheme {shown(scheme)}"
    raise keys.error("global_quant_config", f"has weights of dtype {what}, which are not known")
