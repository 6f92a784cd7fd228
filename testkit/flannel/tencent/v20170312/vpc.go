// Package v20170312 has the names of Tencent's client that Go flannel's backend for that cloud is compiled with. The
// real module is not to be had from the module proxy, and no test runs that backend: everything here refuses.
package v20170312

import "errors"

var errNotBuilt = errors.New("built without Tencent's client")

type Client struct{}

type Filter struct {
	Name   *string
	Values []*string
}

type Route struct {
	RouteId              *uint64
	DestinationCidrBlock *string
	GatewayType          *string
	GatewayId            *string
	RouteType            *string
	Enabled              *bool
}

type RouteTable struct {
	RouteTableId *string
	RouteSet     []*Route
}

type DescribeRouteTablesRequest struct{ Filters []*Filter }

type DescribeRouteTablesResponse struct {
	Response struct{ RouteTableSet []*RouteTable }
}

type RoutesRequest struct {
	RouteTableId *string
	Routes       []*Route
}

func NewClientWithSecretId(id, key, region string) (*Client, error) { return nil, errNotBuilt }

func NewDescribeRouteTablesRequest() *DescribeRouteTablesRequest {
	return new(DescribeRouteTablesRequest)
}
func NewDeleteRoutesRequest() *RoutesRequest { return new(RoutesRequest) }
func NewCreateRoutesRequest() *RoutesRequest { return new(RoutesRequest) }

func (*Client) DescribeRouteTables(*DescribeRouteTablesRequest) (*DescribeRouteTablesResponse, error) {
	return nil, errNotBuilt
}

func (*Client) DeleteRoutes(*RoutesRequest) (any, error) { return nil, errNotBuilt }
func (*Client) CreateRoutes(*RoutesRequest) (any, error) { return nil, errNotBuilt }
