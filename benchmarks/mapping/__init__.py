"""python -m benchmarks.mapping"""
