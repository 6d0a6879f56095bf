"""The page that ``bittern report`` writes: what a manifest tells, as one self-contained HTML file."""
