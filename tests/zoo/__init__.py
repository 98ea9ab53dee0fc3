"""Modules of packages that people use, each compared with torch itself: a slow set, one file a package."""
