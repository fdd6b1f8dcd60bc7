"""Rematerialisation (remat): the choice of forward-pass values that the backward pass reuses instead of recomputing."""

import jax

from distill.nn.linear import PROJECTION

# From most to least memory. 'projections' saves the outputs of all projections and recomputes the rest of each layer;
# 'layers' saves only the inputs of layers.
REMAT_POLICIES = {
  "projections": jax.checkpoint_policies.save_only_these_names(PROJECTION),
  "layers": jax.checkpoint_policies.nothing_saveable,
}
