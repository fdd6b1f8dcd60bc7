import jax
import jax.numpy as jnp
import numpy as np

from distill.adapters import routed
from distill.adapters.edits import LowRank
from distill.adapters.merging import merge_adapters
from distill.adapters.peft import Adapter
from distill.adapters.stack import StackEntry
from distill.checkpoints import hf_config
from distill.models.decoder import Decoder
from distill.teachers.live import LiveTeacher
from distill.types import Batch

MIXTURE = {
  "model_type": "qwen3_moe",
  "vocab_size": 23,
  "hidden_size": 16,
  "intermediate_size": 16,
  "moe_intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "num_experts": 4,
  "num_experts_per_tok": 2,
  "head_dim": 8,
}


def test_an_adapter_on_an_moe_router_gives_equal_hidden_states_routed_by_row_and_merged(tmp_path):
  config = hf_config.config_from_dict(MIXTURE, where="test")
  decoder, rng = Decoder(config), np.random.default_rng(0)
  params = decoder.unstack(jax.device_get(decoder.init(jax.random.key(0))))
  a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 2), (2, 4)))
  edit = LowRank(a=a, b=b, scale=1.0)
  one = (StackEntry(path=tmp_path), Adapter(path=tmp_path, edits=(("layers.0.mlp.router.kernel", edit),)))
  tokens = jnp.asarray(rng.integers(0, 23, (2, 7)))
  batch = Batch(
    tokens=tokens,
    segments=jnp.ones_like(tokens),
    positions=jnp.broadcast_to(jnp.arange(7), tokens.shape),
    loss_mask=jnp.ones(tokens.shape, jnp.float32),
    routes=jnp.asarray([0, 1]),
  )

  def hidden(config, stacked):
    teacher = LiveTeacher(decoder=Decoder(config), params=stacked)
    return np.asarray(teacher.signal(jax.tree.map(jnp.asarray, stacked), batch=batch, dtype=jnp.float32).hidden)

  together = hidden(*routed.stack_with_routes(params, routes=[[one], []], config=config))
  grown, merged = merge_adapters(params, adapters=[one], config=config)
  np.testing.assert_allclose(together[0], hidden(grown, Decoder(grown).stack(merged))[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(together[1], hidden(config, decoder.stack(params))[1], rtol=1e-5, atol=1e-5)
