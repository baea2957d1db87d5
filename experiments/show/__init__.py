"""Show: tables, pages and pictures of finished runs."""
