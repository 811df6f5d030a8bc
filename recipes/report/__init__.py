"""A run as one self-contained HTML page: python -m recipes.report RUN."""
