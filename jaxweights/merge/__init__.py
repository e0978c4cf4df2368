"""Merge several models into one."""

from jaxweights.merge._arcee_fusion import arcee_fusion as arcee_fusion
from jaxweights.merge._breadcrumbs import breadcrumbs as breadcrumbs
from jaxweights.merge._breadcrumbs import breadcrumbs_ties as breadcrumbs_ties
from jaxweights.merge._dare import dare_linear as dare_linear
from jaxweights.merge._dare import dare_ties as dare_ties
from jaxweights.merge._delta import delta_merge as delta_merge
from jaxweights.merge._diagonal_fisher import diagonal_fisher as diagonal_fisher
from jaxweights.merge._fisher import fisher as fisher
from jaxweights.merge._iso import iso_c as iso_c
from jaxweights.merge._iso import iso_cts as iso_cts
from jaxweights.merge._karcher import karcher as karcher
from jaxweights.merge._mean import mean as mean
from jaxweights.merge._model_stock import model_stock as model_stock
from jaxweights.merge._multislerp import multislerp as multislerp
from jaxweights.merge._nearswap import nearswap as nearswap
from jaxweights.merge._nuslerp import nuslerp as nuslerp
from jaxweights.merge._regmean import regmean as regmean
from jaxweights.merge._regmean import regmean_needs as regmean_needs
from jaxweights.merge._slerp import slerp as slerp
from jaxweights.merge._task_arithmetic import add_task_vector as add_task_vector
from jaxweights.merge._task_arithmetic import task_arithmetic as task_arithmetic
from jaxweights.merge._task_arithmetic import task_vector as task_vector
from jaxweights.merge._ties import ties as ties
from jaxweights.merge._tsv import tsv as tsv
