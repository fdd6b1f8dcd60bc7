import numpy as np

from distill.checkpoints.tensor_source import SafetensorsSource
from distill.files import safetensors_files


def test_a_safetensors_source_reads_tensors_from_several_files(tmp_path):
  values = {name: np.arange(12, dtype=np.float32).reshape(3, 4) + i for i, name in enumerate("abc")}
  safetensors_files.write(tmp_path, values, stem="model", max_file_bytes=100)
  source = SafetensorsSource(tmp_path, stem="model")
  infos = source.tensors()
  assert set(infos) == set(values) and len({info.path for info in infos.values()}) == 2
  for name, value in values.items():
    assert (infos[name].name, infos[name].dtype, infos[name].shape) == (name, value.dtype, value.shape)
    block = (slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(source.read(name, index=block), value[block])
