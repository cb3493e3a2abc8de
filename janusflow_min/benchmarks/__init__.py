# SPDX-License-Identifier: MIT
""""""
