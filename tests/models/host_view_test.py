import dataclasses

import jax
import numpy as np

from distill.models.config import AttentionConfig, DecoderConfig, LayerConfig, MlpConfig
from distill.models.decoder import Decoder
from distill.models.host_view import HostView, place
from distill.parallel.mesh import MeshConfig, make_mesh


def test_a_host_view_reads_the_canonical_parameters_back_from_the_devices():
  attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rope=None)
  layer = LayerConfig(mixer=attention, mlp=MlpConfig(width=16))
  odd = dataclasses.replace(layer, mlp=MlpConfig(width=24))
  config = DecoderConfig(family="llama", vocab_size=16, width=8, layers=(layer, layer, odd))
  decoder, mesh, rng = Decoder(config), make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), np.random.default_rng(0)
  stacked = {name: rng.standard_normal(x.shape, np.float32) for name, x in decoder.abstract().items()}
  canonical = decoder.unstack(stacked)

  placed = place(decoder, canonical, mesh=mesh)
  view = HostView(decoder, placed, mesh=mesh)

  assert set(view) == set(canonical) and len(view) == len(canonical)
  jax.tree.map(np.testing.assert_array_equal, dict(view), canonical)
  assert "layers.3.mlp.up.kernel" not in view
