"""lift: any JAX function on represented weights."""

from jaxweights.lift._infer_layout import Trace as Trace
from jaxweights.lift._infer_layout import infer_layout as infer_layout
from jaxweights.lift._infer_layout import trace_model as trace_model
from jaxweights.lift._lift import evaluate_lifted as evaluate_lifted
from jaxweights.lift._lift import lift as lift
from jaxweights.lift._walk import Named as Named
from jaxweights.lift._walk import Walk as Walk
