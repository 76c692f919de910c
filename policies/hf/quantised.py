"""A model's weights as a quantised checkpoint stores them: which matrices are converted, to how many bytes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from policies.dtypes import DTYPE_BITS
from policies.hf.family import Family
from policies.hf.keys import Keys
from policies.hf.matrices import Matrix, matrices
from policies.hf.nemotron import block_numbers
from policies.hf.schemes import Scheme, scheme_of
from policies.model import LayerShape, ModelShape
from policies.weight_formats import Stored


def as_stored(shape: ModelShape, keys: Keys, model_type: str, family: Family) -> ModelShape:
    """The model as its config says that it is quantised; as it is where the config says nothing.

    Raises ValueError for a scheme that is not understood.
    """
    scheme = scheme_of(keys, shape.name)
    if scheme is None:
        return shape
    return Quantiser(scheme, shape, keys, model_type, family).model()


class Quantiser:
    """Counts one model under one scheme, and which dtype most of its weights have in the end."""

    def __init__(self, scheme: Scheme, shape: ModelShape, keys: Keys, model_type: str, family: Family) -> None:
        self._scheme, self._shape, self._keys = scheme, shape, keys
        self._model_type, self._family = model_type, family
        self._params: Counter[str] = Counter()

    def model(self) -> ModelShape:
        """The shape with what is stored otherwise."""
        shape, scheme = self._shape, self._scheme
        numbers = [(i, i) for i in range(shape.n_layers)]
        if self._model_type == "nemotron_h":
            numbers = block_numbers(self._keys)
        layers = tuple(self._layer(layer, at) for layer, at in zip(shape.layers, numbers, strict=True))
        head = scheme.format_of("lm_head")
        head_stored = None
        if head is not None and not shape.tied:
            nbytes = head.nbytes(shape.vocab_size, shape.hidden_dim)
            product = head.dtype if head.quantises_activations else shape.dtype
            head_stored = Stored(head.dtype, product, nbytes, head.blockwise)
        self._params[shape.dtype] += shape.outer_params
        return replace(
            shape,
            layers=layers,
            weight_dtype=self._params.most_common(1)[0][0],
            outer_dtype=shape.dtype,
            head_stored=head_stored,
            kv_dtype=scheme.kv_dtype or shape.kv_dtype,
        )

    def _layer(self, layer: LayerShape, numbers: tuple[int, int]) -> LayerShape:
        """The layer whose attention and MLP stand under these numbers in the checkpoint."""
        found: dict[str, list[Matrix]] = {"qkv": [], "out": [], "dense": [], "expert": []}
        for matrix in matrices(self._keys, layer, self._shape.hidden_dim, self._model_type, self._family):
            found[matrix.part].append(matrix)
        cached = layer.kind != "linear" and layer.share_kv_with is None and self._scheme.kv_dtype is not None
        scales_bytes = self._scheme.kv_scale_bits // 4 if cached else 0
        first, second = numbers
        qkv = self._part(layer.qkv_params, found["qkv"], first)
        expert = self._part(layer.expert_params, found["expert"], second, layer.experts)
        return replace(
            layer,
            qkv_stored=qkv._replace(nbytes=qkv.nbytes + scales_bytes),
            out_stored=self._part(layer.out_params, found["out"], first),
            dense_stored=self._part(layer.dense_params, found["dense"], second),
            expert_stored=expert if layer.experts else None,
        )

    def _part(self, params: int, found: Iterable[Matrix], number: int, copies: int = 1) -> Stored:
        """How weights are stored of which `found` are the matrices, and the rest stays as it was."""
        plain = self._shape.dtype
        sizes: Counter[tuple[str, str, bool]] = Counter()
        nbytes, left = 0, params
        for matrix in found:
            weight_format = self._scheme.format_of(f"layers.{number}.{matrix.name}")
            if weight_format is None or matrix.params > left:
                continue
            left -= matrix.params
            nbytes += weight_format.nbytes(matrix.outputs, matrix.inputs)
            product = weight_format.dtype if weight_format.quantises_activations else plain
            sizes[weight_format.dtype, product, weight_format.blockwise] += matrix.params
        sizes[plain, plain, False] += left
        for (dtype, _, _), size in sizes.items():
            self._params[dtype] += copies * size
        dtype, product, blockwise = max(sizes, key=lambda key: sizes[key])
        return Stored(dtype, product, nbytes + -(-left * DTYPE_BITS[plain] // 8), blockwise)
