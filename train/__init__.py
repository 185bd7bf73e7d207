# SPDX-License-Identifier: Apache-2.0
"""Training scripts: each reads like its recipe, over one small loop."""
