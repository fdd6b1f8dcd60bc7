"""Checkpoints of every family on a mesh."""

import numpy as np
import pytest

from distill.checkpoints import hf, hf_config, sharded
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoints.families import cases


@pytest.mark.parametrize(("family", "case"), cases.FIRST, ids=[family for family, _ in cases.FIRST])
def test_a_model_of_every_family_is_loaded_onto_a_mesh_and_each_byte_is_read_once(family, case, tmp_path):
  config = hf_config.config_from_dict({"model_type": family, **cases.CASES[family][case]}, where="case")
  rng = np.random.default_rng(0)
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hf_config.shapes(config).items()}
  hf.save(tmp_path / "model", config=config, params=params)
  sizes = []
  _, loaded = sharded.load(
    tmp_path / "model", mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), report=sizes.append
  )
  for name, value in Decoder(config).stack(params).items():
    np.testing.assert_array_equal(loaded[name], value)
  assert sum(sizes) == sum(x.nbytes for x in params.values())
