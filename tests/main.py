"""Main program of every Bazel py_test: runs pytest with the arguments of the program."""

import sys

import pytest

if __name__ == "__main__":
  sys.exit(pytest.main(sys.argv[1:]))
