"""Described devices, and meshes of the shapes that users ask for on them."""

import importlib.util

import pytest

from distill.errors import InputError
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.planning.topology import describe

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("v5p", "give a chip and its torus"),
    ("v5p:4by4", "give a chip and its torus"),
    ("h100:8", "'h100' is no chip that can be planned; use one of v5e"),
  ],
)
def test_a_name_that_is_no_topology_is_refused_with_an_example(name, says):
  with pytest.raises(InputError, match=says):
    describe(name)


def test_without_the_compiler_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"install it with `pip install 'distill\[plan\]'`"):
    describe("v5p:4x4x4")


@needs_compiler
@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("v6e:8x8", {"data": 4, "fsdp": 16}),
    ("v6e:8x8", {"data": 1, "fsdp": 16, "tensor": 4}),
    ("v5p:4x4x4", {"data": 8, "fsdp": 8}),
    ("v5p:4x4x4", {"data": 2, "fsdp": 32}),
    ("v5p:4x4x4", {"data": 1, "fsdp": 8, "tensor": 8}),
    ("v5p:8x8x8", {"data": 32, "fsdp": 16}),
    ("v5e:16x16", {"data": 16, "fsdp": 8, "expert": 2}),
    ("2*v5p:4x4x4", {"slice": 2, "data": 4, "fsdp": 16}),
    ("2*v5e:8x8", {"slice": 2, "fsdp": 16}),
  ],
)
def test_usual_mesh_shapes_fit_on_real_tori_and_keep_each_slice_together(name, sizes):
  devices = describe(name).devices
  mesh = make_mesh(MeshConfig(**sizes), devices=devices)
  assert mesh.size == len(devices) == len({device.id for device in mesh.devices.flat})
  assert all(mesh.shape[axis] == size for axis, size in sizes.items())
  for part in mesh.devices:
    assert len({getattr(device, "slice_index", 0) for device in part.flat}) == 1


@needs_compiler
def test_a_mesh_over_two_slices_without_a_slice_axis_is_refused():
  with pytest.raises(InputError, match=r"set config.training.mesh.slice=2"):
    make_mesh(MeshConfig(data=8, fsdp=16), devices=describe("2*v5p:4x4x4").devices)


@needs_compiler
def test_a_torus_that_does_not_exist_is_refused():
  with pytest.raises(InputError, match="v5p:3x5x7"):
    describe("v5p:3x5x7")
