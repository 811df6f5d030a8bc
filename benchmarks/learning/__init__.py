"""python -m benchmarks.learning"""
