"""What a Llama-family checkpoint says about its decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxweights.models._checks import Fields
from jaxweights.models._rope import RopeScaling

LlamaFamily = Literal["llama", "mistral", "qwen2", "qwen3", "olmo2"]
QKNorm = Literal["whole", "head"]
QK_NORMS: dict[LlamaFamily, QKNorm] = {"qwen3": "head", "olmo2": "whole"}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a decoder of the Llama family.

    Attributes:
      vocab_size: Rows of the embedding.
      hidden_size: Features of the residual stream.
      intermediate_size: Features inside the gated MLP.
      num_layers: Decoder layers.
      num_heads: Query heads.
      num_kv_heads: Key and value heads, a divisor of `num_heads`; None means `num_heads`.
      head_dim: Features a head, even; None means `hidden_size / num_heads`.
      norm_eps: Added to the mean square inside every RMSNorm.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: Their change for longer contexts, or None.
      max_positions: Context length the checkpoint was made for.
      sliding_window: Tokens that a query sees, itself included; None means all before it.
      sliding_layers: Which layers the window holds for; None means all.
      qkv_bias: Whether query, key and value projections have a bias.
      out_bias: Whether the attention's output projection has one.
      mlp_bias: Whether the three MLP projections have one.
      qk_norm: What of queries and keys is RMS-normalised: the "whole" projection (OLMo 2), each
        "head", all with one scale (Qwen3), or None for nothing.
      norm_position: "pre" normalises what enters attention and MLP, "post" what leaves them.
      tie_embeddings: Whether the embedding is also the head.
      family: Whose names and file conventions the checkpoint follows.

    Raises:
      TypeError: If a field has the wrong kind; every bad field is listed.
      ValueError: If a field has an impossible value; every bad field is listed.

    Example:
      >>> config = LlamaConfig(
      ...     vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4
      ... )
      >>> config.head_dim, config.num_kv_heads
      (16, 4)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in below
    head_dim: int = None  # type: ignore[assignment]  # filled in below
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm | None = None
    norm_position: Literal["pre", "post"] = "pre"
    tie_embeddings: bool = False
    family: LlamaFamily = "llama"

    def __post_init__(self) -> None:
        """Fills in the two derived sizes and checks every field."""
        fields = Fields("models.LlamaConfig", self)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        fine = all([fields.integer(name, minimum=1) for name in sizes])
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None and fine:
            if self.hidden_size % self.num_heads:
                fields.add(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_heads={self.num_heads}. State head_dim, or choose a divisor."
                )
            object.__setattr__(self, "head_dim", max(2, self.hidden_size // self.num_heads))
        if fine and fields.integer("num_kv_heads", minimum=1):
            if self.num_heads % self.num_kv_heads:
                fields.add(
                    f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}."
                )
        if fine and fields.integer("head_dim", minimum=2) and self.head_dim % 2:
            fields.add(f"head_dim={self.head_dim} must be even: features are rotated in pairs.")
        self._check_options(fields)
        fields.check()

    def _check_options(self, fields: Fields) -> None:
        fields.number("norm_eps", minimum=0.0)
        fields.number("rope_theta", above=0.0)
        fields.integer("max_positions", minimum=1)
        for name in ("qkv_bias", "out_bias", "mlp_bias", "tie_embeddings"):
            fields.flag(name)
        if self.qk_norm is not None:
            fields.one_of("qk_norm", get_args(QKNorm))
        fields.one_of("norm_position", ("pre", "post"))
        fields.one_of("family", get_args(LlamaFamily))
        scaling = self.rope_scaling
        if scaling is not None and not isinstance(scaling, RopeScaling):
            fields.wrong_kind = True
            fields.add(f"rope_scaling={scaling!r} is a {type(scaling).__name__}. Use RopeScaling.")
        elif scaling is not None and scaling.factors is not None:
            if len(scaling.factors) * 2 != self.head_dim:
                fields.add(
                    f"rope_scaling has {len(scaling.factors)} factors, but head_dim="
                    f"{self.head_dim} has {self.head_dim // 2} frequencies."
                )
        if self.sliding_window is not None:
            fields.integer("sliding_window", minimum=1)
        self._check_sliding_layers(fields)

    def _check_sliding_layers(self, fields: Fields) -> None:
        layers = self.sliding_layers
        if layers is None:
            return
        if not isinstance(layers, tuple) or not all(isinstance(flag, bool) for flag in layers):
            fields.wrong_kind = True
            fields.add(f"sliding_layers={layers!r} must be a tuple of bools, one a layer.")
        elif self.sliding_window is None:
            fields.add("sliding_layers is set but sliding_window is None. Set both or neither.")
        elif len(layers) != self.num_layers:
            fields.add(f"sliding_layers has {len(layers)} entries for {self.num_layers} layers.")
