"""A report as one HTML file that needs nothing else: no network, no other file, no JavaScript to be read."""

from coop.report.page.write import render_page, write_page

__all__ = ["render_page", "write_page"]
