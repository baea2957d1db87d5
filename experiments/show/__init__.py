"""Show: tables, scores, pages and pictures of finished runs.

tables            Tables in Markdown.
cells             Reads the cells of a study.
report            One page from finished runs, made by report_page.
patches           Which expert takes which patch of your images.
"""
