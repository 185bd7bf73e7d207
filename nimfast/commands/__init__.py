# SPDX-License-Identifier: Apache-2.0
"""What the command lines do. Their options stand in ``nimfast/NAME.py``, which imports the module
here only once they are parsed: ``--help`` and a mistyped option need not wait for torch.
"""
