"""The generate command prints continuations in the order of their prompts."""

from distill.cli import generate


def test_the_first_continuation_is_printed_in_pieces_and_the_others_after_it(command, monkeypatch):
  pieces = [["a", "x", ""], ["b", "", "z"], ["", "y", ""]]
  monkeypatch.setattr(generate, "generate_pieces", lambda *_, **__: iter(pieces))
  out, _ = command("generate", "--model=m", "--prompt=1", "--prompt=2", "--prompt=3")
  assert out == "ab\nxy\nz\n"
