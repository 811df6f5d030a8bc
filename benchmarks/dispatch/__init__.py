"""python -m benchmarks.dispatch"""
