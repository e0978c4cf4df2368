"""lift: any JAX function on represented weights."""

from jaxweights.lift._lift import lift as lift
