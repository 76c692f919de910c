def report_html(results, slo=None, warmup_s=0):
    return ""
