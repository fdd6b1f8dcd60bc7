"""The exception for wrong input, whose message says what is wrong and what to do."""


class InputError(ValueError):
  """Wrong input from outside (file, flag, configuration, data).

  The message is one line that names the file and the key and says what to do. The command line prints it
  without a traceback and exits with code 2.
  """
