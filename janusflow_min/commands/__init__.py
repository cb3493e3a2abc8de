# SPDX-License-Identifier: MIT
"""Commands of the command line that have a file of their own; each offers `add_parser(command, option)`."""
