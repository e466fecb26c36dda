"""Doors to other libraries; each module needs an extra, and nothing in the core imports one."""
