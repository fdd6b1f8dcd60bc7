"""Main program of every py_test: runs pytest on the files that its arguments name."""

import sys

import pytest

if __name__ == "__main__":
  sys.exit(pytest.main(sys.argv[1:]))
