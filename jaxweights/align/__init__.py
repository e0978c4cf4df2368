"""Align independently trained models: permutations of hidden units that change no function."""

from jaxweights.align._activation_matching import ActivationMatching as ActivationMatching
from jaxweights.align._activation_matching import activation_matching as activation_matching
from jaxweights.align._barrier import Barrier as Barrier
from jaxweights.align._barrier import loss_barrier as loss_barrier
from jaxweights.align._curve_figure import loss_curve_figure as loss_curve_figure
from jaxweights.align._figure import alignment_figure as alignment_figure
from jaxweights.align._infer import infer_permutations as infer_permutations
from jaxweights.align._match_many import MatchedMany as MatchedMany
from jaxweights.align._match_many import match_many as match_many
from jaxweights.align._model_specs import bert_permutations as bert_permutations
from jaxweights.align._model_specs import llama_permutations as llama_permutations
from jaxweights.align._model_specs import mlp_permutations as mlp_permutations
from jaxweights.align._permute import apply_permutation as apply_permutation
from jaxweights.align._permute import compose as compose
from jaxweights.align._permute import invert as invert
from jaxweights.align._singular_vectors import LayerAlignment as LayerAlignment
from jaxweights.align._singular_vectors import SingularVectorAlignment as SingularVectorAlignment
from jaxweights.align._singular_vectors import (
    singular_vector_alignment as singular_vector_alignment,
)
from jaxweights.align._singular_vectors import singular_vector_products as singular_vector_products
from jaxweights.align._spec import AxisName as AxisName
from jaxweights.align._spec import Permutations as Permutations
from jaxweights.align._spec import PermutationSpec as PermutationSpec
from jaxweights.align._straight_through import StraightThrough as StraightThrough
from jaxweights.align._straight_through import (
    straight_through_matching as straight_through_matching,
)
from jaxweights.align._transform import permute as permute
from jaxweights.align._weight_matching import Matching as Matching
from jaxweights.align._weight_matching import weight_matching as weight_matching

# What help() lists; type checkers read the imports.
__all__ = [name for name in dir() if not name.startswith("_")]  # pyright: ignore
