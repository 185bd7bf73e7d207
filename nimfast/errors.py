# SPDX-License-Identifier: Apache-2.0
"""The one exception that a command line turns into a single readable line."""


class UserError(Exception):
    """Something the user gave cannot be used: says what was wrong and what to do, in one line."""
