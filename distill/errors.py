"""The exception for wrong input, whose message says what is wrong and what to do."""


class InputError(ValueError):
  """Raised for wrong input from outside: a file, a flag, the configuration or data.

  The message is one line that names the file and the key and says what to do. The command line prints it
  without a traceback and exits with code 2.
  """
