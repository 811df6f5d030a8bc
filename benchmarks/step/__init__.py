"""python -m benchmarks.step"""
