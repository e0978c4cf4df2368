"""Merge several models into one."""

from jaxweights.merge._breadcrumbs import breadcrumbs as breadcrumbs
from jaxweights.merge._breadcrumbs import breadcrumbs_ties as breadcrumbs_ties
from jaxweights.merge._dare import dare_linear as dare_linear
from jaxweights.merge._dare import dare_ties as dare_ties
from jaxweights.merge._delta import delta_merge as delta_merge
from jaxweights.merge._diagonal_fisher import diagonal_fisher as diagonal_fisher
from jaxweights.merge._fisher import fisher as fisher
from jaxweights.merge._mean import mean as mean
from jaxweights.merge._regmean import regmean as regmean
from jaxweights.merge._regmean import regmean_needs as regmean_needs
from jaxweights.merge._task_arithmetic import add_task_vector as add_task_vector
from jaxweights.merge._task_arithmetic import task_arithmetic as task_arithmetic
from jaxweights.merge._task_arithmetic import task_vector as task_vector
from jaxweights.merge._ties import ties as ties
