import os
import signal

import pytest

from distill.parallel.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_requests_a_stop_without_ending_the_process(number):
  before = signal.getsignal(number)
  with Interruption() as interruption:
    assert not interruption.requested()
    os.kill(os.getpid(), number)
    assert interruption.requested()
  assert signal.getsignal(number) is before


def test_a_second_sigterm_does_not_end_the_process_but_a_later_sigint_does():
  with Interruption() as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
